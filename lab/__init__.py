"""The measurements behind docs/replication.md: plans, the runs they ask for, the page drawn from them."""
