"""The measurements behind docs/replication.md: plans, the runs they ask for, and the page drawn from their lines."""
