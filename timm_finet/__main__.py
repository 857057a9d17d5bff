from timm_finet_cli import main

main()
