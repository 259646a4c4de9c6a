"""What a run leaves behind in RUN."""
