"""Where to look on a slide, and what will be done: transforms, tissue, blocks and the plan of a run."""
