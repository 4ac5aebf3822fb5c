"""What activations are on real text: the one place of ``make`` that runs a session."""
