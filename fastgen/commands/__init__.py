"""The commands of `fastgen`, by what they are for. Each imports what it needs when it runs."""
