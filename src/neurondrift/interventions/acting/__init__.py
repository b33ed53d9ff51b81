"""What is done to a group, as contexts and callbacks that give everything back: on weights, on outputs, in training."""
