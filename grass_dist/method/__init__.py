"""The method of the paper: when what is measured and drawn. It knows no wrapper, no launcher and no optimizer."""
