"""What the project computes, frozen: `python -m tests.golden` says where today's code gives anything else."""
