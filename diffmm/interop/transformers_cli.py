"""The command line of Hugging Face transformers with diffmm's models.

    python -m diffmm.interop.transformers_cli serve FOLDER

takes the arguments of `transformers`, which itself knows only its own models. `serve` needs
`pip install transformers[serving]`, and a tokenizer with a chat template beside the weights.
"""

from transformers.cli.transformers import main

import diffmm.interop.transformers_models  # noqa: F401 (registers the models)

if __name__ == "__main__":
    main()
