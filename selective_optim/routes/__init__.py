"""One optimizer of several classes: which route takes which parameter.

``route`` says what a route is and asks which one takes a parameter; ``routed`` is the
optimizer; ``muon`` that of Muon and AdamW; ``loading`` reads what others saved.
"""
