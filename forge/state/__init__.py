"""What a model keeps of a sequence between steps, by kind of layer."""
