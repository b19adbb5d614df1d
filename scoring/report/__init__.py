"""How an evaluation is shown: tables in the terminal, and an HTML page that needs nothing else."""
