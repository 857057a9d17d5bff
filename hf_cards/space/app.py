from timm_finet.commands.space import space

space()
