"""Draw the inputs, check a provider against float64, time it, describe the machine."""
