"""One optimizer of several classes: which route takes which parameter.

``route`` says what a route is and asks which one takes a parameter or a state that was
saved; ``routed`` has the optimizers.
"""
