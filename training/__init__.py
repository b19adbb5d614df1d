"""What a training run needs beside a method: its flags, its folder, its loop.

    flags.py      the flags of train.py that every method has
    rows.py       training rows from a file or a hub data set
    preview.py    what the rows become: which fit, how many tokens, two of them printed
    runs.py       the run's folder: its lock, what a checkpoint remembers, where to go on
    trainer.py    the order of rows, the schedule, transformers.Trainer with a method's loss
    callbacks.py  progress bar, signals, what follows a pass, whole checkpoints
"""
