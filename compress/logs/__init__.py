"""What a run says while it works: the stage's log, and the trackers that it is sent to."""
