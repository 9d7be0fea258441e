"""The step: decays in, torch's own kernels called, and no policy imported.

A plan (``plan``) is all calls of a step. It is made at the first step and replayed; the
``stepper`` keeps it, and makes another where it is no longer true (``Stepper.plans``
counts them).

What is planned:

1. ``cells`` sorts the parameters: a cell has those of one group that were decided
   alike, live alike and go the same way. The way is chosen in ``fused.goes_fused``:

   - torch's fused kernel, on the tensor or on the local shard of a ``DTensor``: where
     the user chose it, or left that open and it is right; and where it can walk them;
   - else torch's functional: for-loop, foreach, or what torch makes of the flags.

   Missing state is begun as torch begins it, but for fused momentum buffers (see
   ``SGDKernel.begin``) and counters (see 7).
2. What its group says now and what was decided for it give each cell a setting
   (``setting``). Cells of one setting and way make a bucket (``buckets``), whatever
   their groups: a thousand groups of one setting are two, what decays and what is
   exempt. Small tensors on a CPU have buckets of their own, for one thread
   (``cells.ALONE``).
3. ``kernel``, with ``adam_kernel`` and ``sgd_kernel``, turns a bucket into calls: one
   of torch's kernel, and before it those of decay that this kernel cannot do
   (``decay_ahead``): towards a target, "cautious", SGD's decoupled one.
   ``Kernel.share`` tells which. ``triton_adamw``, if switched on, joins many calls of
   AdamW's kernel in one.

At every step (``Plan.current_grads``, then ``Plan.run``):

4. Is the plan still true? Numbers and parameters are compared by identity: only another
   object can stand for another value. What can be edited in place, such as a list, is
   compared with a copy. Gradients are mostly new tensors: those of fused buckets are
   compared by traits, in one call of the guard that compiled code uses. Where it
   fails, each tensor is looked at once. All of this is in ``guards``, but for what
   concerns shards and functional buckets.
5. What is done again where something changed:

   - hyperparameters: settings, and buckets where cells no longer go together;
   - a gradient that is absent for once: the calls of this step;
   - flags that choose a way, other parameters, a first gradient, tensors that no longer
     fit, the policy, a loaded state, a step that raised: the plan.

6. Functional buckets run first, as they may raise. The calls of all others run without
   a line of Python between them (``Plan._perform``): an interrupt comes before or after
   them, or within a pass of ``decay_ahead``, which is Python.
7. State is the user's. Until ``optimizer.state`` is read or set, nobody outside can
   edit it: a plan may hold its tensors, and counters of fused parameters view one
   tensor per device, which advances by one addition (``counters``). From then on it is
   lent: each counter becomes a tensor of its own, and a plan lets go of all state after
   a step and gathers and proves it at the next, at 0.5 us per parameter.
8. A ``GradScaler`` hands its tensors over with ``fused=True`` alone (``grad_scaler``).
   Kernels unscale and skip, counters fall back, and no device is waited for, but where
   momentum begins in a step that may be dropped.

Compiled steps, those of an optimizer that was made differentiable, and those of a
subclass with its own ``_init_group`` have no plan: ``Kernel.traced`` steps the lists
that torch fills, as it does for functional buckets.
"""
