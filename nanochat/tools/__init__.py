"""What a model may use: a calculator while it writes, and a sandbox that runs the code it wrote."""
