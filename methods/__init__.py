"""One module per published system, each with the same seven functions in the same order:

add_args, load_rows, prepare_model, build_tree, compute_loss, decode_tree, decode_messages.
"""

from importlib import import_module

METHODS = {
    "peft": "possibility",
    "otm": "possibility",
    "oto": "possibility",
    "base": "possibility",
}


def load_method(name: str):
    """The module that implements a method."""
    return import_module(f"methods.{METHODS[name]}")
