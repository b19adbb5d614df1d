"""How an evaluation is shown: the table in the terminal, and one HTML page that needs nothing else."""
