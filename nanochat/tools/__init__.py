"""What a model may use: a calculator, and a sandbox for the code that it writes."""
