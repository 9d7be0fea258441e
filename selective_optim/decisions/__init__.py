"""Who decides what decays, and to which tensor each decision belongs.

``decider`` asks the policy when a group comes in, when the policy is assigned, and when
groups were edited; ``table`` finds the decision of a tensor wherever that has moved;
``initial_values`` holds what some decay starts from; ``state_dict`` checks and records;
``deciding_for`` serves frameworks that call the constructor themselves.
"""
