"""Any other optimizer class, which finds every group split by decay.

The three classes of this library put decay into the kernel call, and need no split.
For all others the class itself is given groups that were split by hand, so to say:

1. ``any_class.selective`` makes a subclass of a class. ``refusals`` says of which
   class that cannot be right, and why.
2. ``optimizer.SplitOptimizer`` stands before the class. Outside, ``param_groups`` are
   the user's; while the class constructs, steps, saves or loads they are the parts.
3. ``parts`` makes one part per group and decay, and keeps it from step to step: what
   the class writes into its groups stays with the part, and what is the same in all
   parts shows in the user's group.
   It also puts parts together in a state dict, and takes one apart.
4. ``groups.param_groups`` returns split groups as a list, for what cannot be served.

Who decays is decided by ``selective_optim._decider``, as for the three classes.
"""
