"""What training is made of: steps, optimizer, schedules, checkpoints, run directories, logs."""
