"""The command line of Hugging Face transformers with diffmm's models.

    python -m diffmm.interop.transformers_cli serve FOLDER

takes the arguments of `transformers`, which itself knows only its own models. `serve` needs
`pip install transformers[serving]`, and a tokenizer with a chat template beside the weights.
"""

from typing import Any

from transformers.cli.serving import model_manager
from transformers.cli.transformers import main

from diffmm.interop.transformers_models import DiffmmForCausalLM

# The server looks for the class of a model in transformers, as its module has imported it; the
# package may replace itself in `sys.modules` later.
_package: Any = model_manager.transformers
_package.DiffmmForCausalLM = DiffmmForCausalLM

if __name__ == "__main__":
    main()
