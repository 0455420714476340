"""`loka advise`: which mods the evidence of a run calls for, with the figure that says so and what it would change."""
