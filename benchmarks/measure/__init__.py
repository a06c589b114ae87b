"""One measurement: draw the inputs, check against float64, time, describe the machine."""
