"""What Ray counts of a CPU for each kind of work, so that planning and every worker know it without torch."""

# Of a training worker: more would not make it faster, and whole nodes could stay half empty; folds that share one train
# slower together than one after another. Source: ours, by the demo
WORKER_CPUS = 1
DECODE_CPUS = 1.0  # of each thread that reads a source, for scoring and for preparing
# Less than DECODE_CPUS, or Ray fuses a model actor of one CPU with decoding and the two never overlap.
CPU_MARGIN = 0.01
