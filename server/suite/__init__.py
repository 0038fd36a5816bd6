"""`whipstaff eval suite`: every method on the tasks that it is for, beside its rival and its cost, through HTTP."""
