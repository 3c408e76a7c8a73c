"""What a real installation must be able to do before a night is trusted to it, tried out rather than asked for."""
