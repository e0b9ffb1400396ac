"""The parts of the training command, in the order in which a run uses them.

flags, config, settings    command line -> configuration -> every open setting filled
build                      configuration -> images, networks, queue, optimiser, backend
feed, step                 batches in order; one training step and the state it changes
run                        the loop: steps, log, checkpoints, evaluations
meter, progress, events    numbers of the steps -> metrics.jsonl, the terminal, TensorBoard
run_folder, checkpoint     what is on disk, and how it gets there whole
resume, interrupt          going on from a checkpoint; stopping at a signal
picture                    the nearest neighbours as an image
allocator                  malloc's settings
"""
