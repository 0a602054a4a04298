"""Models as stacks of named layers (`build`, `layered`, `convs`), and the folders they are stored in (`io`)."""
