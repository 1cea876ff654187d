"""`make chaos`: commands under random faults, each followed by the same command undisturbed; nothing may be lost, doubled, wrong or hung.

    make chaos ARGS="seconds=600 seed=7 store=local"      # or store=s3; round=13 repeats one round of that seed
    make chaos ARGS="flips count=1000 seed=7"             # one bit of each file after the other (`flips.py`)
    make chaos ARGS="inputs count=1000 seed=7"            # damaged, forged and hostile files (`inputs.py`)
    make histories ARGS="count=500 seed=1 store=local"    # sources that live, and what follows them (`histories.py`)
    make chaos ARGS="ray_data kills=12"                   # another thing: encoding beside Ray Data's, under the same kills (`ray_data.py`)

A round takes one command (shard, an append to it, train, encode, encode after the append, the whole pipeline) and one class of faults
(`faults.py`), runs the command under them, then undisturbed to its end, and compares what it made with what a run without faults makes
(`work.py`). The seed decides command, class, moment and number of faults of every round. Moments are counted in files that appeared or in
requests, not in seconds; what a machine makes of them still differs from run to run. The price of real commands: some seconds a round,
which is why most rounds have several faults before the undisturbed command.
"""
