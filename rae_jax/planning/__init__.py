"""What a run costs on machines that are not here, and on the one that is."""
