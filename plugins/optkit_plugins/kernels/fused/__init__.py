"""What a decode step's products do beside multiplying, and the compiler's pass that puts it there."""
