"""What is known of the models: how upstream's code is entered, and whether a layer may be read instead of called."""
