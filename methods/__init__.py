"""One module per published system, each with the same six functions in the same order:

add_args, load_rows, prepare_model, build_tree, compute_loss, decode_tree.
"""

from importlib import import_module

METHODS = {
    "peft": "possibility",
    "otm": "possibility",
    "oto": "possibility",
    "base": "possibility",
    "diffuse": "diffuse",
}
OWN_INFERENCE = ("diffuse",)  # methods with rows and flags of their own in infer.py, replies kept as they are drawn


def load_method(name: str):
    """The module that implements a method."""
    return import_module(f"methods.{METHODS[name]}")
