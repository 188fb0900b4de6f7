"""What the scripts of this folder share: networks, data, recipes, training, grids of runs, plots."""
