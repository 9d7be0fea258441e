"""Who decides what decays, and to which tensor each decision belongs.

``decider`` asks the policy when a group comes in, when the policy is assigned, and when
groups were edited; ``table`` finds the decision of a tensor wherever that has moved;
``state_dict`` checks and records; ``watch`` looks at steps for what only they can tell;
``deciding_for`` serves frameworks that call the constructor themselves.
"""
