"""Reports over clocks: which SM clock of each role costs the least energy within the SLO."""
