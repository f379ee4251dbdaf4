"""What keeps a run alive: files, run directories, processes, estimates of memory and time."""
