"""What judges a run: verdict, recommendation, gains, doubts; never imports what draws."""
