"""The arithmetic of FBN: functions of tensors, which know no modules and no networks."""
