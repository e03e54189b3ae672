"""What people type: the `diti` command and what stands behind its verbs."""
