"""One module per published system, each with the same seven functions in the same order:

add_args, load_rows, prepare_model, build_tree, compute_loss, decode_tree, decode_messages.
"""

from importlib import import_module

METHODS = {
    "peft": "possibility",
    "otm": "possibility",
    "oto": "possibility",
    "base": "possibility",
    "diffuse": "diffuse",
    "spt": "spt",
    "delia": "delia",
    "control": "control",
}
OWN_INFERENCE = ("diffuse", "spt", "delia", "control")  # methods with rows and flags of their own in infer.py, replies kept as they are drawn
OWN_EVALUATION = {  # a field of every row, and the module with figures for such rows
    "targets": "methods.diffuse.evaluation",
    "persona": "methods.spt.evaluation",
    "asks_format": "methods.delia.evaluation",
    "wants": "methods.control.evaluation",
}
OWN_ADAPTER = ("spt",)  # methods whose checkpoints hold no PEFT adapter: parameter_groups, save_adapter, load_adapter, restore_adapter
OWN_PLAN = ("spt",)  # methods that answer rows in a way of their own in infer.py


def load_method(name: str):
    """The module that implements a method."""
    return import_module(f"methods.{METHODS[name]}")


def own_evaluation(systems: dict[str, list[dict]]) -> str | None:
    """The module that scores rows like these, if they are of a kind of their own."""
    rows = [row for own in systems.values() for row in own]
    return next((module for field, module in OWN_EVALUATION.items() if all(field in row for row in rows)), None)
