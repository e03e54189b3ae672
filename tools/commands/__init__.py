"""What each verb of `diti` takes and prints. What it does is in the modules beside this folder."""
