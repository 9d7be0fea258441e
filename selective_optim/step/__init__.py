"""The step: decays in, torch's own kernels called, and nothing known of policies.

How a step works, in the order of time:

1. ``stepper`` keeps a plan between steps. It asks ``Plan.current_grads`` whether the
   plan is still true, which gives this step's gradients, and runs it. If not, it
   makes a new plan. ``Stepper.plans`` counts them.
2. A plan begins with ``cells``: parameters of one group, decided alike, living alike
   (dtype, device, layout), going the same way. State that is missing is made as torch
   makes it. The way of a parameter is chosen in ``key_of``, and the choice of fused
   stands in ``fused``:

   - torch's fused kernel, on the tensor or on the local shard of a ``DTensor``, where
     the user chose it or left the choice open, and the tensors are what that kernel
     reads right: dense, laid out alike, of a dtype and device that it has;
   - else torch's functional: for-loop, foreach, or what torch would choose.

3. Cells whose groups have equal hyperparameters make a bucket (``buckets``): one call
   of one kernel. A thousand groups with one setting are two calls. Small tensors are
   called on one thread, see ``cells.ALONE``. ``kernel`` and its two kinds,
   ``adam_kernel`` and ``sgd_kernel``, turn a setting and lists of tensors into calls.
   What torch's kernel cannot decay, towards a target or where the update agrees, is a
   pass ahead of it (``decay_ahead``), and the kernel then decays nothing.
   ``Kernel.share`` parts the work. ``triton_adamw`` makes many calls of AdamW one,
   where that is asked for.
4. What must still hold at the next step is written down in ``guards``. Numbers, lists
   of parameters and parameters are compared by identity: only someone outside can
   replace them, and nobody can make two objects one. What can be edited in place (a
   list, an array) is compared with a copy. Gradients are new at every step and are
   compared by traits, all in one call of the guard that compiled code uses.
5. What makes a plan stale, and what is done again:

   - hyperparameters: settings are read anew, cells put into buckets anew;
   - flags that choose a path, another set of parameters, a first gradient, a gradient
     or state of other traits: a new plan;
   - a gradient that is absent for once: nothing, its parameter is left out.

6. State is the user's. Until ``optimizer.state`` is read, nothing outside can edit it,
   and the plan keeps its tensors. From then on it is lent: a plan holds no tensor
   between steps, and gathers and proves them at each, at 0.5 us per parameter.
7. Counters (``counters``) that a step makes view one tensor per device, which advances
   by one addition. Before the state is lent each becomes a tensor of its own.
8. The calls run without a line of Python between them (``Plan._perform``), so that an
   interrupt comes before the first or after the last. Functional buckets, which may
   raise, go first. Under a ``GradScaler`` (``grad_scaler``) counters fall back where it
   dropped the step; nothing waits for the device.

A compiled or differentiable step takes none of this: ``Kernel.traced`` calls torch's
functional for autograd or the compiler to follow.
"""
