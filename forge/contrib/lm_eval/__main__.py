"""``python -m forge.contrib.lm_eval``: the harness's command line, which knows ``--model forge``.

The harness finds `forge` by its entry point from the release behind 0.4.13 on: then ``lm_eval`` does, too.
"""

import forge.contrib.lm_eval  # noqa: F401 (registers the model)

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
