"""What a model keeps of a sequence between steps, by kind of layer.

A kind is a file: a frozen class of integers that answers `kind.Kind`, and the arrays that its `allocate` makes. The
planner asks the kind for bytes, the scheduler for pages, the model reads `ModelState[layer]`.
"""
