"""The parts of the training command, in the order in which a run uses them.

flags, config, settings    command line -> configuration -> every open setting filled
build                      configuration -> images, networks, queue, optimiser, backend
feed, step                 batches in order; one training step and the state it changes
optimizers, schedules      the student's optimiser; what changes by plan from step to step
views                      how a step's views are made, and what is cut of the files for them
run                        the loop: steps, log, checkpoints, evaluations
describe                   what it tells of itself before the first step
meter, progress, events    numbers of the steps -> metrics.jsonl, the terminal, TensorBoard
run_folder, lock           what is on disk, and who may write there
checkpoint, rotation       how it gets there whole; the newest, the ones before it, the best
resume, interrupt          going on from a checkpoint; stopping at a signal
diagnose                   the tensor in which the numbers failed
picture                    the nearest neighbours as an image
allocator                  malloc's settings
"""
