from neurondrift.cli import main

main()
