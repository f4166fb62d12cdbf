"""What every long-running command shares: its command line, run directory, checkpoints, metrics, interruption."""
